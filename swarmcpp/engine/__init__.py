"""The engine: slots, the pure scheduler, and the loop. It knows no network; its link is given to it."""
