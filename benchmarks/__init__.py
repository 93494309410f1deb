"""Side-by-side measurements of Featherweight itself. `make bench` runs them; figures are ratios taken within one run."""
