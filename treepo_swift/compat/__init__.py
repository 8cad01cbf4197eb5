"""What depends on other packages' versions, and on machines without an accelerator."""
