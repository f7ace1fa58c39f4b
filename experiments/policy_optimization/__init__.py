"""How a policy is improved from the rewards of what it wrote."""
