"""HTTP/1.1 on sockets: connections, what bounds them, and the end of the process."""
