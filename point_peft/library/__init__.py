"""Libraries of adapters: what a folder or a collection of the Hub holds, and how models share it.

from point_peft import AdapterLibrary
library = AdapterLibrary("adapters", most=16, bytes=200e6)
with library.activated(model, "grasp"):
    logits = model(clouds)
"""
