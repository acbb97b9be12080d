"""Where rollouts and training meet: one module a backbone."""
