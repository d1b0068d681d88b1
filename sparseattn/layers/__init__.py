"""nn.Modules that attend sparsely: drop-in layers and the methods they choose keys by."""
