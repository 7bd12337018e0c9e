"""The files of an export, by name."""

CONFIG, GUIDE, ITEMS, USERS = "config.json", "README.md", "items.parquet", "users.parquet"
WEIGHTS, GRAPH = "model.safetensors", "model.onnx"
AGAIN = "Run the export stage again, or copy the folder again and completely."  # what to do about a damaged one
