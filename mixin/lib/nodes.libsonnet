// Names of nodes, for metrics of who does not know them.
{
  // `expr`, which has the labels of node_exporter's `instance`, with the node's label. node_exporter does not know the node's
  // name in Kubernetes, but its host name is the same. Instances of two clusters without a cluster's label may have one
  // address and two names: they are nobody's.
  named(c, expr):: |||
    label_replace(
      %(expr)s
      * on (%(cluster)s, instance) group_left (nodename)
      (
        group by (%(cluster)s, instance, nodename) (node_uname_info{%(sel)s})
        and on (%(cluster)s, instance)
        count by (%(cluster)s, instance) (group by (%(cluster)s, instance, nodename) (node_uname_info{%(sel)s})) == 1
      ),
      "%(node)s", "$1", "nodename", "(.*)"
    )
  ||| % { expr: expr, cluster: c.clusterLabel, node: c.nodeLabel, sel: c.nodeExporterSelector },
}
