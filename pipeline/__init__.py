"""Chains of commands: jobs, Slurm, the memory plan, the growth study. May import every package."""
