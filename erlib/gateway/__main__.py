"""``python -m erlib.gateway``: one routing gateway."""

from erlib.gateway.process import main

main()
