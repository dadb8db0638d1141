//! Certificates for workloads: asked for by the proxy of their node, which has attested the process.

use super::Ca;
use super::revoke::time;
use super::service::failed;
use crate::api::{bad, status};
use crate::policy::wall;
use leeward_identity::authority::MIN_LIFE;
use leeward_identity::{CheckedRequest, PeerInfo, Role, SpiffeId};
use leeward_policy::Name;
use leeward_policy::model::Workload;
use leeward_proto::v1;
use tonic::Status;

impl Ca {
    /// A certificate for a workload of a proxy's node. Which process has it is the proxy's word, as which request comes from its
    /// node is; that the workload is there at all, and for this proxy, is policy's.
    pub(super) async fn issue_workload(
        &self,
        peer: &PeerInfo,
        request: &v1::IssueWorkloadRequest,
    ) -> Result<v1::Issued, Status> {
        let Role::Proxy { zone, name: proxy } = peer.id.role() else {
            return Err(Status::permission_denied(format!(
                "{} is not a proxy; only proxies ask for workloads",
                peer.id
            )));
        };
        let now = wall();
        self.check_peer(peer, now).await?;
        let shown: String = request.workload.chars().take(63).collect();
        let name =
            Name::parse(&request.workload).map_err(|error| bad("workload", format!("{shown:?} {error}")))?;
        let known = self.shared.policy.workload(name.clone()).await.map_err(status)?;
        check(known.as_ref(), &name, (zone.as_str(), proxy.as_str())).map_err(Status::permission_denied)?;
        let id = SpiffeId::workload(peer.id.trust_domain(), &zone, name.as_str())
            .map_err(|error| Status::internal(error.to_string()))?;
        let checked = CheckedRequest::parse(&request.request, &id)
            .map_err(|error| bad("request", error.to_string()))?;
        // What a node has vouched for ends with the node's own certificate at the latest: of one that is shut out nothing is
        // left that is good.
        let left = peer.not_after.duration_since(now).unwrap_or_default();
        let life = self.shared.life.min(left);
        if life < MIN_LIFE {
            return Err(Status::unauthenticated(format!(
                "the certificate of {} is about to end, and one for a workload ends no later; renew it first",
                peer.id
            )));
        }
        let since = self.revoked_since(&id).await?.map(|row| time(row.at_ms));
        let (issued, mut row) = self
            .sign_for(&checked, &id, life, since)
            .map_err(|error| failed(&error))?;
        // Every proxy of the zone may have one of the same id.
        row.by = Some(proxy);
        self.remember(row).await.map_err(status)?;
        Ok(self.wire(&issued))
    }
}

/// Why policy gives a proxy no certificate for a workload.
fn check(known: Option<&Workload>, name: &Name, (zone, proxy): (&str, &str)) -> Result<(), String> {
    let Some(workload) = known else {
        return Err(format!("there is no Workload/{name}"));
    };
    if workload.zone.as_str() != zone {
        let theirs = &workload.zone;
        return Err(format!(
            "Workload/{name} is of the zone {theirs}, and {proxy} of the zone {zone}"
        ));
    }
    if workload.proxies.is_empty() || workload.proxies.iter().any(|named| named.as_str() == proxy) {
        return Ok(());
    }
    Err(format!(
        "Workload/{name} names proxies, and {proxy} is none of them"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    #[test]
    fn policy_says_which_proxies_ask_for_what() {
        let mut workload = Workload {
            zone: name("a"),
            proxies: Vec::new(),
            uids: vec![1000],
            cgroups: Vec::new(),
        };
        let asks = |workload: Option<&Workload>, zone, proxy| check(workload, &name("pay"), (zone, proxy));
        assert_eq!(asks(Some(&workload), "a", "a1"), Ok(()));
        assert!(asks(None, "a", "a1").unwrap_err().contains("no Workload/pay"));
        assert!(
            asks(Some(&workload), "b", "a1")
                .unwrap_err()
                .contains("of the zone a")
        );
        workload.proxies = vec![name("a2")];
        assert_eq!(asks(Some(&workload), "a", "a2"), Ok(()));
        assert!(
            asks(Some(&workload), "a", "a1")
                .unwrap_err()
                .contains("none of them")
        );
        assert!(asks(Some(&workload), "b", "a2").is_err());
    }
}
