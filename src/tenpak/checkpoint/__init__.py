"""Reading models: safetensors headers, source checkpoints, and how their tensors map to the model's parameters."""
