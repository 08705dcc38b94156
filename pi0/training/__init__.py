"""What training in JAX and in PyTorch share: data, noise, the folder of a run, its metrics. Knows neither."""
