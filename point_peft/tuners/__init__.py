"""The methods, one folder each; `point_peft` imports every folder, so that its configuration registers itself."""
