"""A synthetic world of pedestrians, and what tries the papers on it: tiny models, practice servers, toys."""
