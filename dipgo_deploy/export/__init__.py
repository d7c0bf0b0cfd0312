"""torch to ONNX: one traced graph, cut into variants that share one weights file, published as an engine directory."""
