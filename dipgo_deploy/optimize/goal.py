"""What is wanted of an optimisation. No torch: it is checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from dipgo_deploy import arguments
from dipgo_deploy.errors import UserError

# Numbers of launches that are tried for a quality, as far as the full run has more.
COUNTS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 17, 20, 25)
QUALITY = 0.99


@dataclass(frozen=True)
class Goal:
    """What is wanted; one of the three, or none of them, which is a quality of ``QUALITY``.

    Attributes:
        launches: of the denoiser.
        speedup: of the loop, as far as the denoiser is all of it.
        quality: the SSIM to the full run's pictures that the lower end of the 95% interval has to reach.
        minutes: for search and fit, loading and export not counted.
    """

    launches: int | None = None
    speedup: float | None = None
    quality: float | None = None
    minutes: float = 10.0

    def check(self) -> None:
        """Refuse (UserError) a goal that contradicts itself, before anything is loaded."""
        given = [name for name in ("launches", "speedup", "quality") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"--{given[0]} and --{given[1]}: give one of --launches, --speedup and --quality")
        if self.launches is not None:
            arguments.whole("launches", self.launches, least=1)
        if self.speedup is not None and not 1 < self.speedup < 1000:
            raise UserError(f"--speedup {self.speedup:g}: give a number above 1, such as 5")
        if self.quality is not None and not 0 < self.quality < 1:
            raise UserError(f"--quality {self.quality:g}: is an SSIM; give a number between 0 and 1, such as 0.99")
        if not 0 < self.minutes < 10_000:
            raise UserError(f"--minutes {self.minutes:g}: give a number above 0")

    def counts(self, full: int) -> tuple[int, ...]:
        """Numbers of launches to try, the smallest first, of a full run of so many evaluations.

        Raises:
            UserError: the full run has no more launches than that.
        """
        if self.launches is None and self.speedup is None:
            counts = tuple(count for count in COUNTS if count < full)
            if not counts:
                raise UserError(f"--steps: a full run of {full} evaluations leaves nothing to save; give more")
            return counts
        wanted = self.launches if self.launches is not None else int(full / float(self.speedup or 1))
        if not 1 <= wanted < full:
            name = f"--launches {self.launches}" if self.launches is not None else f"--speedup {self.speedup:g}"
            raise UserError(f"{name}: not of a full run of {full} evaluations; give fewer launches or more --steps")
        return (wanted,)
