// CoreDNS with the plug-ins that the local cluster needs, and no others: a third of the compile time.
package main

import (
	"github.com/coredns/coredns/core/dnsserver"
	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/log"
	_ "github.com/coredns/coredns/plugin/ready"

	"github.com/coredns/coredns/coremain"
)

func init() { dnsserver.Directives = []string{"bind", "ready", "log", "errors", "cache", "kubernetes"} }

func main() { coremain.Run() }
