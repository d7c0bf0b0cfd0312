"""What ``tools.gpu_check`` is made of: the models, the torch peers, the measurements, the report."""
