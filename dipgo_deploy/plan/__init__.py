"""The compiler's middle: from a block graph and a schedule to variants, launches and a cache arena. Pure Python."""
