"""What the benchmarks of the packages share beyond the timer: annotation of the published sizes, loaders, exported encoders."""
