"""Is the hypergradient right here, and if not, why?"""
