"""Times as a person says them."""


def render_duration(seconds: float) -> str:
    """A duration: `45 s`, `12 min`, `3.4 h`; what clocks that differ make negative is none.

    Example:
        >>> render_duration(720)
        '12 min'
    """
    if seconds < 120:
        return f"{max(seconds, 0):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
