//! Tokens and certificates in the store. What has begun is finished even if the caller goes away.

use super::{Policy, Refused, detached};
use crate::kv::Watch;
use crate::store::{IssuedRow, NewToken, RevocationRow, TokenUse};
use leeward_policy::model::Workload;
use leeward_policy::{Key, Kind, Name, Spec};

impl Policy {
    /// Keeps a token.
    pub(crate) async fn put_token(&self, token: NewToken, now_ms: i64) -> Result<(), Refused> {
        let store = self.store.clone();
        detached(async move { Ok(store.put_token(&token, now_ms).await?) }).await
    }

    /// Uses a token up for one key pair, if it is good, and was not made before `since`.
    pub(crate) async fn use_token(
        &self,
        hash: [u8; 32],
        (id, since): (String, Option<i64>),
        used_by: String,
        now_ms: i64,
    ) -> Result<TokenUse, Refused> {
        let store = self.store.clone();
        let using = async move { Ok(store.use_token(&hash, (&id, since), &used_by, now_ms).await?) };
        detached(using).await
    }

    /// Remembers a certificate that is about to be given.
    pub(crate) async fn put_certificate(&self, row: IssuedRow, now_ms: i64) -> Result<(), Refused> {
        let store = self.store.clone();
        detached(async move { Ok(store.put_certificate(&row, now_ms).await?) }).await
    }

    /// A Workload, as policy has it now; one that this build can't read is none.
    pub(crate) async fn workload(&self, name: Name) -> Result<Option<Workload>, Refused> {
        self.store.settle().await?;
        let kind = Kind::Workload;
        let world = self.world().await?;
        let entry = world.known.get(&Key { kind, name });
        let resource = entry.and_then(|entry| entry.resource.as_deref());
        Ok(match resource.map(|resource| &resource.spec) {
            Some(Spec::Workload(workload)) => Some(workload.clone()),
            _ => None,
        })
    }

    /// Forgets the certificates of an id.
    pub(crate) async fn forget_certificates(&self, id: String) -> Result<(), Refused> {
        let store = self.store.clone();
        detached(async move { Ok(store.forget_certificates(&id).await?) }).await
    }

    /// The certificates that are still good.
    pub(crate) async fn certificates(&self, now_ms: i64) -> Result<Vec<IssuedRow>, Refused> {
        Ok(self.store.certificates(now_ms).await?)
    }

    /// Keeps a revocation, and answers what is kept.
    pub(crate) async fn put_revocation(
        &self,
        row: RevocationRow,
        now_ms: i64,
    ) -> Result<RevocationRow, Refused> {
        let store = self.store.clone();
        detached(async move { Ok(store.put_revocation(&row, now_ms).await?) }).await
    }

    /// Takes a revocation back, and answers what it was.
    pub(crate) async fn take_revocation(&self, id: String) -> Result<Option<RevocationRow>, Refused> {
        let store = self.store.clone();
        detached(async move { Ok(store.take_revocation(&id).await?) }).await
    }

    /// The revocation of an id.
    pub(crate) async fn revocation(&self, id: &str) -> Result<Option<RevocationRow>, Refused> {
        Ok(self.store.revocation(id).await?)
    }

    /// All revocations.
    pub(crate) async fn revocations(&self, now_ms: i64) -> Result<Vec<RevocationRow>, Refused> {
        Ok(self.store.revocations(now_ms).await?)
    }

    /// Tells whenever one is written from now on.
    pub(crate) async fn watch_revocations(&self) -> Result<Watch, Refused> {
        Ok(self.store.watch_revocations().await?)
    }
}
