"""Every operator against eager PyTorch, torch.compile and peft, on this CPU."""
