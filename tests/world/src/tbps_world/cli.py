"""Console commands of the world. Heavy libraries are imported when a command starts to work, not to print its help."""

from tbps_common.run.command import command


@command
def synth_main(argv: list[str]) -> int:
    """`tbps-synth`: draw the synthetic pedestrians and write every data-set layout."""
    from tbps_world.synth.commands import main

    return main(argv)


@command
def train_tiny_main(argv: list[str]) -> int:
    """`tbps-train-tiny`: start weights for the toys, trained on persons whom no toy draws."""
    from tbps_world.pretrain.commands import main

    return main(argv)


@command
def cmlfa_tiny_main(argv: list[str]) -> int:
    """`cmlfa-make-tiny-clip`: write a small random CLIP model, to try the commands without a download."""
    from tbps_world.tiny.cmlfa import main

    return main(argv)


@command
def cmlfa_toy_main(argv: list[str]) -> int:
    """`cmlfa-toy`: the synthetic world, a tiny model, the paper's commands, and what comes out of them."""
    from tbps_world.toys.cmlfa import main

    return main(argv)


@command
def fafa_tiny_main(argv: list[str]) -> int:
    """`fafa-make-tiny`: a tiny model's description and a handful of pictures, to try the commands without a download."""
    from tbps_world.tiny.fafa import main

    return main(argv)


@command
def fafa_toy_main(argv: list[str]) -> int:
    """`fafa-toy`: the synthetic world, a tiny model, the paper's commands, and what comes out of them."""
    from tbps_world.toys.fafa import main

    return main(argv)


@command
def syncpr_tiny_main(argv: list[str]) -> int:
    """`fafa-syncpr-make-tiny`: tiny models for the stages of fafa-syncpr."""
    from tbps_world.tiny.syncpr import main

    return main(argv)


@command
def syncpr_toy_main(argv: list[str]) -> int:
    """`fafa-syncpr-toy`: SynCPR from nothing to a trained FAFA, with tiny models."""
    from tbps_world.toys.syncpr import main

    return main(argv)


@command
def mra_tiny_main(argv: list[str]) -> int:
    """`mra-make-tiny`: write small random weights and configurations, to try the commands without a download."""
    from tbps_world.tiny.mra import main

    return main(argv)


@command
def mra_toy_main(argv: list[str]) -> int:
    """`mra-toy`: the synthetic world, tiny weights, the paper's commands, and what comes out of them."""
    from tbps_world.toys.mra import main

    return main(argv)


@command
def dad_tiny_main(argv: list[str]) -> int:
    """`mra-dad-make-tiny`: tiny models for the stages of mra-dad."""
    from tbps_world.tiny.dad import main

    return main(argv)


@command
def dad_toy_main(argv: list[str]) -> int:
    """`mra-dad-toy`: SDA from nothing to a pre-trained MRA, with tiny models."""
    from tbps_world.toys.dad import main

    return main(argv)


@command
def diana_tiny_main(argv: list[str]) -> int:
    """`diana-make-tiny`: write small random backbones, to try the commands without a download."""
    from tbps_world.tiny.diana import main

    return main(argv)


@command
def diana_toy_main(argv: list[str]) -> int:
    """`diana-toy`: the synthetic world, tiny towers, the paper's scripts, and what comes out of them."""
    from tbps_world.toys.diana import main

    return main(argv)


@command
def dp_tiny_main(argv: list[str]) -> int:
    """`dp-make-tiny`: write tiny models under the names that the paper's commands use."""
    from tbps_world.tiny.dp_gen_command import main

    return main(argv)


@command
def dp_toy_main(argv: list[str]) -> int:
    """`dp-toy`: the synthetic world, tiny models, the paper's commands, and what comes out of them."""
    from tbps_world.toys.dp_gen import main

    return main(argv)


@command
def compare_toy_main(argv: list[str]) -> int:
    """`compare-toy`: the toys' models and a plain CLIP on one gallery of people whom none has seen."""
    from tbps_world.toys.compare import main

    return main(argv)


@command
def claims_toy_main(argv: list[str]) -> int:
    """`claims-toy`: what a paper claims, tried with several seeds."""
    from tbps_world.toys.claims import main

    return main(argv)
