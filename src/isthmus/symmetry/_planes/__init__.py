"""Planes of two units that turn together: what rotary embeddings leave free of the dimensions of heads.

A rotary embedding turns pairs of dimensions by angles that depend on the position. It lets no single dimension change
its place, but every pair may be turned by an angle of its own, and stretched where queries take a factor that keys take
out again. Units are followed through the graph as linear forms with symbolic coefficients (``walk``), and every inner
product in which they end is looked at, term by term (``scores``). That the tables act alike on both members of a pair
is so proven from how their entries are computed; of constants alone, whole slices are compared.
"""

from isthmus.symmetry._planes.find import with_planes

__all__ = ["with_planes"]
