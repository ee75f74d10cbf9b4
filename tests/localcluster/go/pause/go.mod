module manthanquant.io/localcluster/pause

go 1.24
