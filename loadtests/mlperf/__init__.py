"""MLPerf LoadGen drives the service over HTTP."""
