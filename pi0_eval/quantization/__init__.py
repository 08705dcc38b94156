"""How far quantization moves a policy, layer by layer: `pi0-quantize-report`."""
