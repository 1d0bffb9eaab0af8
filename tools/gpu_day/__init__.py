"""The GPU day: a parent of the standard library alone, children that do the work, records that survive both.

``command`` reads the options; ``phases`` is the timetable; ``day`` goes through it; ``shapes`` is what it measures;
``machine`` stands for the device; ``child`` talks to a process that may hang; ``tools`` runs programs; ``build`` and
``pack`` see to the libraries; ``records`` keeps what happened and ``table`` prints it.
"""
