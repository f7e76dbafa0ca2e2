"""Start weights for the toys: tiny models that have learnt from persons whom no toy draws (`tbps-train-tiny`)."""
