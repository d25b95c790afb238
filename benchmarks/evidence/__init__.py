"""The experiments behind docs/results.md: what is run (plan.toml), how (runner, cell), what is said of it (report)."""
