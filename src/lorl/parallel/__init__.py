"""How one run's work is spread over processes and devices, behind the `Workers` protocol."""
