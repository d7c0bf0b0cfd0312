"""Hostile and broken documents, byte flips and kills by the thousand: ``python -m tools.campaign --help``.

``kinds`` has a file for each kind of document: how one is changed, and what may come of it. ``worker`` tries them in
forked processes, ``verdict`` judges, ``kills`` stops commands at random times, ``report`` counts.
"""
