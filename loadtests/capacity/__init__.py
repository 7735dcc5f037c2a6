"""How many machines a rate of requests needs, from measured figures and a queueing model of the tail."""
