"""The layer that imports Ray: sessions, shards on Ray Data, worker groups on Ray Train."""
