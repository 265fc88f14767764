"""USB: buses, matching, and what a driver host needs to reach its one device."""
