"""A sampler as programs that run without this package: torch.export, AOTInductor and ONNX."""
