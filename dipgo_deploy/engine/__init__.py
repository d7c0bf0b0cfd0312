"""Building TensorRT engines from an engine directory's graphs."""
