//! What each method of the API takes: a line for each. A method that isn't here is refused.

use Need::{Anyone, Each, Peer, ProxyOr, Whole};
use leeward_policy::model::AccessRole;

/// What a method takes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Need {
    /// To be a user.
    Anyone,
    /// The role for something; the method itself looks at each resource that it is about.
    Each(AccessRole),
    /// The role for everything.
    Whole(AccessRole),
    /// To be a proxy, or else a user with the role for everything.
    ProxyOr(AccessRole),
    /// It is not for users: the method itself looks at the peer's certificate. Not served over HTTP and JSON.
    Peer,
}

const READER: AccessRole = AccessRole::Reader;
const OPERATOR: AccessRole = AccessRole::Operator;

/// Every method that is served, by `PACKAGE.SERVICE/METHOD`.
const METHODS: &[(&str, Need)] = &[
    // An apply can be a dry run; what is written is looked at one by one.
    ("leeward.v1.PolicyService/Apply", Each(READER)),
    ("leeward.v1.PolicyService/Diff", Each(READER)),
    ("leeward.v1.PolicyService/Get", Each(READER)),
    ("leeward.v1.PolicyService/List", Each(READER)),
    ("leeward.v1.PolicyService/Delete", Each(READER)),
    ("leeward.v1.PolicyService/Watch", Each(READER)),
    ("leeward.v1.PolicyService/ListProxies", Each(READER)),
    ("leeward.v1.DegradationService/ListLevels", Each(READER)),
    ("leeward.v1.DegradationService/ListChanges", Each(READER)),
    ("leeward.v1.PluginService/Push", Whole(OPERATOR)),
    ("leeward.v1.PluginService/Get", Whole(READER)),
    ("leeward.v1.PluginService/List", Whole(READER)),
    ("leeward.v1.PluginService/Delete", Whole(OPERATOR)),
    ("leeward.v1.PluginService/Fetch", ProxyOr(READER)),
    ("leeward.v1.Identity/CreateToken", Whole(OPERATOR)),
    ("leeward.v1.Identity/GetAuthority", Whole(READER)),
    ("leeward.v1.Identity/Rotate", Whole(OPERATOR)),
    ("leeward.v1.Identity/Revoke", Whole(OPERATOR)),
    ("leeward.v1.Identity/ListRevocations", Whole(READER)),
    ("leeward.v1.Identity/Restore", Whole(OPERATOR)),
    ("leeward.v1.AuditService/ListAudit", Each(READER)),
    ("leeward.v1.BackupService/CreateBackup", Whole(OPERATOR)),
    ("leeward.v1.BackupService/ListBackups", Whole(READER)),
    ("leeward.v1.BackupService/GetBackupStatus", Whole(READER)),
    ("leeward.v1.BackupService/Promote", Whole(AccessRole::Breakglass)),
    ("leeward.v1.ExplainService/Explain", Whole(READER)),
    ("leeward.v1.ExplainService/Lint", Whole(READER)),
    ("leeward.v1.RolloutService/GetRollout", Whole(READER)),
    ("leeward.v1.RolloutService/GetProgress", Whole(READER)),
    ("leeward.v1.RolloutService/ListRevisions", Whole(READER)),
    ("leeward.v1.RolloutService/GetRevision", Whole(READER)),
    ("leeward.v1.RolloutService/Steer", Whole(OPERATOR)),
    ("leeward.v1.RolloutService/Rollback", Whole(OPERATOR)),
    ("leeward.v1.PeerService/GetStanding", Peer),
    ("leeward.v1.PeerService/ListOwnProxies", Peer),
    ("leeward.v1.Identity/Issue", Peer),
    ("leeward.v1.Identity/IssueWorkload", Peer),
    ("leeward.v1.Identity/Join", Peer),
    ("leeward.v1.PushService/Subscribe", Peer),
    // What there is to call, and how.
    ("grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Anyone),
    ("openapi.json", Anyone),
];

/// Methods that change nothing, by the beginnings of their names. Whatever isn't one of them is audited.
const READS: &[&str] = &[
    "Get",
    "List",
    "Watch",
    "Diff",
    "Fetch",
    "ServerReflectionInfo",
    "openapi.json",
    "Explain",
    "Lint",
];

/// A method and what it takes, by its path.
pub(crate) fn need(path: &str) -> Option<(&'static str, Need)> {
    let method = path.strip_prefix('/')?;
    METHODS.iter().find(|(name, _)| *name == method).copied()
}

/// Whether a method changes nothing.
pub(crate) fn is_read(method: &str) -> bool {
    let name = method.rsplit('/').next().unwrap_or_default();
    READS.iter().any(|read| name.starts_with(read))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::descriptors;

    #[test]
    fn every_method_of_the_api_is_here_once() {
        let mut served: Vec<String> = descriptors()
            .services()
            .filter(|service| service.package_name() == "leeward.v1")
            .flat_map(|service| {
                let name = service.full_name().to_owned();
                service
                    .methods()
                    .map(move |m| format!("{name}/{}", m.name()))
                    .collect::<Vec<_>>()
            })
            .collect();
        let mut listed: Vec<_> = METHODS.iter().map(|(name, _)| (*name).to_owned()).collect();
        listed.retain(|name| name.starts_with("leeward.v1."));
        served.sort();
        listed.sort();
        assert_eq!(served, listed);
        assert!(need("/leeward.v1.PolicyService/Nothing").is_none() && need("").is_none());
    }
}
