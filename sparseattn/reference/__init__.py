"""What each op means: naive torch, any float dtype, any device."""
