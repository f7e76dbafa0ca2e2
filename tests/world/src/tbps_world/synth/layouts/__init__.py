"""One module per family of layouts; `registry.LAYOUTS` lists them all."""
