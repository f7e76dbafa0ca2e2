"""What every console command shares: one clear line for a user's mistake, and the right exit status."""

import errno
import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from tbps_common.errors import InputError

EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
# Device files of NVIDIA's and AMD's drivers, and of their Linux subsystem under Windows.
_GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")

Main = Callable[[list[str]], int | None]


def command(main: Main) -> Callable[..., int]:
    """Turn `main(argv)` into an entry point `main(argv=None) -> exit status` that never shows a traceback by default.

    It also lets torch's threads share the processors with other programs, see `share_processors`.

    * `InputError`: `error: <message>`, status 2 (as argparse does for unusable flags);
    * `OSError` (full disk, read-only folder): `error: ...` naming the file, status 1;
    * anything else: one line naming the exception, status 1.

    The traceback is shown with `--debug` anywhere on the command line or `TBPS_DEBUG=1`, and for unexpected
    exceptions also when several processes run (the launcher shows nothing else of a failed rank).
    """

    @functools.wraps(main)
    def entry(argv: Sequence[str] | None = None) -> int:
        arguments = list(sys.argv[1:] if argv is None else argv)
        debug = "--debug" in arguments or os.environ.get("TBPS_DEBUG", "") not in ("", "0")
        arguments = [argument for argument in arguments if argument != "--debug"]
        share_processors()
        try:
            return main(arguments) or 0
        except InputError as error:
            return _report(error, EXIT_BAD_INPUT, debug, _own_sentence(error))
        except KeyboardInterrupt as error:
            return _report(error, EXIT_INTERRUPTED, debug, "interrupted")
        except BrokenPipeError:
            # The reader of our output (`| head`) has gone; nothing is left to say, and Python would complain at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_FAILURE
        except OSError as error:
            return _report(error, EXIT_FAILURE, debug, _os_error_sentence(error))
        except Exception as error:
            show = debug or int(os.environ.get("WORLD_SIZE", "1") or 1) > 1
            first_line = (str(error).strip().splitlines() or ["no message"])[0]
            sentence = f"{type(error).__name__}: {first_line} (run again with --debug for the traceback)"
            return _report(error, EXIT_FAILURE, show, sentence)

    return entry


def share_processors() -> None:
    """On a machine without a GPU, let waiting OpenMP threads sleep; a no-op if the user has chosen how they wait.

    They spin otherwise, and where other programs use the processors too, a thread that spins keeps the one it waits for
    from running: a small training step can take 16 times as long. Alone on the machine, sleeping costs about a tenth.
    It must be called before torch is imported.
    """
    chosen = any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"))
    if not chosen and not any(map(os.path.exists, _GPU_FILES)):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def usable_processors() -> int:
    """How many processors this process may use: those of its affinity, where the system has one."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _report(error: BaseException, status: int, show_traceback: bool, sentence: str | None = None) -> int:
    if show_traceback:
        traceback.print_exception(error)
    print(f"error: {sentence if sentence is not None else error}", file=sys.stderr, flush=True)
    return status


def _own_sentence(error: InputError) -> str:
    """The sentence of an error that a DataLoader's worker raised: torch puts the worker's traceback before it."""
    text = str(error)
    if not text.startswith("Caught "):
        return text
    return text.rpartition(f"{type(error).__name__}: ")[2].strip() or text


def _os_error_sentence(error: OSError) -> str:
    reason = error.strerror or type(error).__name__
    where = f" ({error.filename})" if error.filename else ""
    remedy = {
        errno.ENOSPC: "; free some space and run the command again",
        errno.EFBIG: "; the file-size limit is reached: raise it (ulimit -f) and run the command again",
        errno.EROFS: "; choose an output folder that can be written",
        errno.EACCES: "; check the permissions of that path",
        errno.EEXIST: "; a file stands where a folder is needed: name another folder",
        errno.ENOTDIR: "; a file stands where a folder is needed: name another folder",
    }.get(error.errno or 0, "")
    return f"{reason}{where}{remedy}"
