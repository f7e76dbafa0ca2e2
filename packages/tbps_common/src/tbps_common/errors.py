"""Errors whose message is written for the person at the keyboard.

Every message is one complete sentence that names the file, record or flag and says what to do about it.
`tbps_common.run.command.command` prints it as one line and exits with status 2.
"""


class InputError(ValueError):
    """What the user gave (a flag, a file, a folder) cannot be used as it is."""


class DatasetError(InputError):
    """A data-set folder, annotation file, record or image cannot be used."""


class ImageError(DatasetError):
    """An image file is missing, is no image, is damaged, or has too many pixels."""


class CheckpointError(InputError):
    """A checkpoint cannot be read, cannot be trusted, or does not fit the model."""


class GalleryError(InputError):
    """A gallery index cannot be read, or belongs to another model."""
