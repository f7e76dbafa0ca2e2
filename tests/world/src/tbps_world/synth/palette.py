"""Colours of everything drawn: one RGB anchor per colour word, and the tones derived from it."""

from tbps_world.synth.raster import Colour

CLOTHES: dict[str, Colour] = {
    "black": (26, 26, 30),
    "white": (250, 250, 248),
    "grey": (92, 94, 98),
    "red": (205, 28, 36),
    "blue": (32, 72, 196),
    "green": (30, 138, 58),
    "yellow": (250, 222, 52),
    "pink": (246, 132, 178),
    "orange": (240, 112, 16),
    "purple": (122, 42, 152),
    "brown": (92, 56, 30),
    "beige": (212, 170, 110),
}
HAIR: dict[str, Colour] = {
    "black": (24, 20, 22),
    "brown": (104, 58, 26),
    "blonde": (232, 192, 84),
    "grey": (168, 168, 172),
}
SKIN: dict[str, Colour] = {"light": (240, 200, 172), "medium": (202, 148, 108), "dark": (122, 78, 52)}
METAL: Colour = (196, 200, 206)
EYE: Colour = (22, 20, 24)
LENS: Colour = (176, 204, 222)
LIPS: Colour = (196, 62, 72)
UMBRELLA: Colour = (24, 104, 112)
PHONE: Colour = (18, 18, 22)
SCREEN: Colour = (120, 220, 255)


def toned(colour: Colour, percent: int) -> Colour:
    """Return the colour scaled to a percentage of its brightness, cut at 255."""
    red, green, blue = (min(255, (channel * percent + 50) // 100) for channel in colour)
    return red, green, blue


def blended(colour: Colour, other: Colour, percent: int) -> Colour:
    """Return the mixture that holds `percent` of `other`."""
    red, green, blue = ((a * (100 - percent) + b * percent + 50) // 100 for a, b in zip(colour, other))
    return red, green, blue


def shaded(colour: Colour) -> Colour:
    """Return the tone of the side turned away from the light; very dark colours turn lighter, to stay visible."""
    return toned(colour, 87) if sum(colour) > 150 else blended(colour, (255, 255, 255), 9)


def contrasted(colour: Colour) -> Colour:
    """Return a tone for seams, pockets and zips, visible on the colour."""
    return toned(colour, 62) if sum(colour) > 240 else blended(colour, (255, 255, 255), 30)
