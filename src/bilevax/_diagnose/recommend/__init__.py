"""Which rule?"""
