"""Who answers: c-BTM's clusterer, other routers, and how they compare."""
