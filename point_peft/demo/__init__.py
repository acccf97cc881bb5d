"""The page to try adapters in a browser: `point-peft demo`."""
