//! Join tokens and the certificates that were issued, on disk: a restart neither makes a used token good again nor forgets
//! whose certificate leads to an old root.

use super::{Store, StoreError, failed, signed, unsigned};
use rusqlite::params;

pub(super) const TABLES: &str = "
    CREATE TABLE join_tokens (
        hash BLOB PRIMARY KEY, id TEXT NOT NULL, who TEXT NOT NULL, created_ms INTEGER NOT NULL,
        expires_ms INTEGER NOT NULL, used_ms INTEGER
    ) WITHOUT ROWID;
    CREATE INDEX join_tokens_by_end ON join_tokens (expires_ms);
    CREATE TABLE certificates (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, fingerprint TEXT NOT NULL, root TEXT NOT NULL,
        not_after_ms INTEGER NOT NULL
    );
    CREATE INDEX certificates_by_id ON certificates (id, seq);
    CREATE INDEX certificates_by_end ON certificates (not_after_ms);";

/// Tokens that may wait to be used.
const MAX_TOKENS: u64 = 10_000;
/// How long one that was used, or has ended, is remembered, so that whoever tries it again hears what became of it; in
/// milliseconds: 7 days.
const TOKEN_KEPT_MS: i64 = 7 * 24 * 3600 * 1000;
/// Certificates of one id that are remembered.
const MAX_OF_ID: u64 = 4;

/// A token that was made.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NewToken {
    /// The hash of its secret.
    pub hash: [u8; 32],
    /// Whom it is for.
    pub id: String,
    /// Who made it.
    pub who: String,
    /// When it ends, in milliseconds since 1970.
    pub expires_ms: i64,
}

/// What came of the use of a token.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum TokenUse {
    /// It was good, and is used now.
    Good,
    /// There is none of that hash.
    Unknown,
    /// It was used before, at this time.
    Used(i64),
    /// It ended at this time.
    Ended(i64),
    /// It is for somebody else.
    Other,
}

/// A certificate that was issued.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct IssuedRow {
    /// Whose it is.
    pub id: String,
    /// SHA-256 of it, in hexadecimal digits.
    pub fingerprint: String,
    /// The root that it leads to.
    pub root: String,
    /// When it ends, in milliseconds since 1970.
    pub not_after_ms: i64,
}

impl Store {
    /// Keeps a token.
    ///
    /// # Errors
    ///
    /// [`StoreError::Tokens`] if there are as many as may be; or if the database fails.
    pub fn put_token(&self, token: &NewToken, now_ms: i64) -> Result<(), StoreError> {
        let mut writer = self.writer();
        let tx = writer.transaction().map_err(failed("begin"))?;
        let write = failed("keep a token");
        tx.execute(
            "DELETE FROM join_tokens WHERE expires_ms < ?1",
            [now_ms.saturating_sub(TOKEN_KEPT_MS)],
        )
        .map_err(&write)?;
        let waiting: i64 = tx
            .query_row(
                "SELECT count(*) FROM join_tokens WHERE used_ms IS NULL AND expires_ms >= ?1",
                [now_ms],
                |row| row.get(0),
            )
            .map_err(&write)?;
        if unsigned(waiting) >= MAX_TOKENS {
            return Err(StoreError::Tokens(unsigned(waiting)));
        }
        tx.execute(
            "INSERT INTO join_tokens VALUES (?1, ?2, ?3, ?4, ?5, NULL)",
            params![token.hash, token.id, token.who, now_ms, token.expires_ms],
        )
        .map_err(&write)?;
        tx.commit().map_err(failed("commit"))
    }

    /// Uses a token up, if it is good: of two that come at once with the same, one finds it good.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub fn use_token(&self, hash: &[u8; 32], id: &str, now_ms: i64) -> Result<TokenUse, StoreError> {
        let mut writer = self.writer();
        let tx = writer.transaction().map_err(failed("begin"))?;
        let used = tx
            .execute(
                "UPDATE join_tokens SET used_ms = ?3
                 WHERE hash = ?1 AND id = ?2 AND used_ms IS NULL AND expires_ms >= ?3",
                params![hash, id, now_ms],
            )
            .map_err(failed("use a token"))?;
        if used == 1 {
            tx.commit().map_err(failed("commit"))?;
            return Ok(TokenUse::Good);
        }
        let mut query = tx
            .prepare("SELECT id, expires_ms, used_ms FROM join_tokens WHERE hash = ?1")
            .map_err(failed("read a token"))?;
        let mut rows = query.query([hash]).map_err(failed("read a token"))?;
        let Some(row) = rows.next().map_err(failed("read a token"))? else {
            return Ok(TokenUse::Unknown);
        };
        let read = || -> rusqlite::Result<(String, i64, Option<i64>)> {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?))
        };
        let (for_id, expires_ms, used_ms) = read().map_err(failed("read a token"))?;
        Ok(match used_ms {
            _ if for_id != id => TokenUse::Other,
            Some(used_ms) => TokenUse::Used(used_ms),
            None => TokenUse::Ended(expires_ms),
        })
    }

    /// Remembers a certificate that is about to be given, and forgets those that have ended.
    ///
    /// # Errors
    ///
    /// If the database fails; the certificate must not be given then.
    pub fn put_certificate(&self, row: &IssuedRow, now_ms: i64) -> Result<(), StoreError> {
        let mut writer = self.writer();
        let tx = writer.transaction().map_err(failed("begin"))?;
        let write = failed("remember a certificate");
        tx.execute("DELETE FROM certificates WHERE not_after_ms < ?1", [now_ms])
            .map_err(&write)?;
        tx.execute(
            "INSERT INTO certificates (id, fingerprint, root, not_after_ms) VALUES (?1, ?2, ?3, ?4)",
            params![row.id, row.fingerprint, row.root, row.not_after_ms],
        )
        .map_err(&write)?;
        // One that asks again and again has no use for what it asked for before.
        tx.execute(
            "DELETE FROM certificates WHERE id = ?1 AND seq NOT IN
                 (SELECT seq FROM certificates WHERE id = ?1 ORDER BY seq DESC LIMIT ?2)",
            params![row.id, signed(MAX_OF_ID)],
        )
        .map_err(&write)?;
        tx.commit().map_err(failed("commit"))
    }

    /// The certificates that are still good, by id, for each the oldest first.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub fn certificates(&self, now_ms: i64) -> Result<Vec<IssuedRow>, StoreError> {
        self.read("read certificates", |db| {
            let mut query = db.prepare(
                "SELECT id, fingerprint, root, not_after_ms FROM certificates WHERE not_after_ms >= ?1 ORDER BY id, seq",
            )?;
            let rows = query.query_map([now_ms], |row| {
                Ok(IssuedRow {
                    id: row.get(0)?,
                    fingerprint: row.get(1)?,
                    root: row.get(2)?,
                    not_after_ms: row.get(3)?,
                })
            })?;
            rows.collect()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::Scratch;

    fn token(n: u8) -> NewToken {
        NewToken {
            hash: [n; 32],
            id: "spiffe://td/zone/a/proxy/a1".into(),
            who: "spiffe://td/user/ada".into(),
            expires_ms: 1000,
        }
    }

    #[test]
    fn a_token_is_good_once_until_it_ends_and_for_one() {
        let dir = Scratch::new();
        let (one, two) = (token(1), token(2));
        {
            let store = Store::open(&dir.0).unwrap();
            store.put_token(&one, 0).unwrap();
            store.put_token(&two, 0).unwrap();
            assert_eq!(
                store
                    .use_token(&one.hash, "spiffe://td/zone/a/proxy/a2", 10)
                    .unwrap(),
                TokenUse::Other
            );
            assert_eq!(store.use_token(&one.hash, &one.id, 10).unwrap(), TokenUse::Good);
            assert_eq!(store.use_token(&[9; 32], &one.id, 10).unwrap(), TokenUse::Unknown);
        }
        let store = Store::open(&dir.0).unwrap();
        assert_eq!(
            store.use_token(&one.hash, &one.id, 20).unwrap(),
            TokenUse::Used(10)
        );
        assert_eq!(
            store.use_token(&two.hash, &two.id, 1001).unwrap(),
            TokenUse::Ended(1000)
        );
        // They are forgotten a week after they ended.
        store.put_token(&token(3), 1000 + TOKEN_KEPT_MS + 1).unwrap();
        assert_eq!(
            store.use_token(&one.hash, &one.id, 20).unwrap(),
            TokenUse::Unknown
        );
    }

    #[test]
    fn of_many_at_once_one_finds_a_token_good() {
        let dir = Scratch::new();
        let store = Store::open(&dir.0).unwrap();
        store.put_token(&token(1), 0).unwrap();
        let good = std::thread::scope(|scope| {
            let tries: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| store.use_token(&[1; 32], &token(1).id, 5).unwrap()))
                .collect();
            tries
                .into_iter()
                .map(|t| t.join().unwrap())
                .filter(|u| *u == TokenUse::Good)
                .count()
        });
        assert_eq!(good, 1);
    }

    #[test]
    fn tokens_that_wait_are_bounded() {
        let dir = Scratch::new();
        let store = Store::open(&dir.0).unwrap();
        let db = rusqlite::Connection::open(dir.0.join("leeward.db")).unwrap();
        db.execute_batch(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 10000)
             INSERT INTO join_tokens SELECT CAST(printf('%032d', i) AS BLOB), 'x', 'y', 0, 1000, NULL FROM n;",
        )
        .unwrap();
        assert!(matches!(
            store.put_token(&token(1), 0),
            Err(StoreError::Tokens(10_000))
        ));
        store
            .put_token(
                &NewToken {
                    expires_ms: 9000,
                    ..token(1)
                },
                1001,
            )
            .unwrap();
    }

    #[test]
    fn certificates_are_remembered_until_they_end_and_a_few_of_each() {
        let dir = Scratch::new();
        let store = Store::open(&dir.0).unwrap();
        let row = |id: &str, n: i64| IssuedRow {
            id: id.into(),
            fingerprint: format!("f{n}"),
            root: "r".into(),
            not_after_ms: n,
        };
        for n in 100..110 {
            store.put_certificate(&row("a", n), 0).unwrap();
        }
        store.put_certificate(&row("b", 50), 0).unwrap();
        let kept: Vec<i64> = store
            .certificates(0)
            .unwrap()
            .iter()
            .map(|row| row.not_after_ms)
            .collect();
        assert_eq!(kept, [106, 107, 108, 109, 50]);
        assert_eq!(store.certificates(108).unwrap().len(), 2);
        store.put_certificate(&row("c", 500), 200).unwrap();
        assert_eq!(store.certificates(0).unwrap(), [row("c", 500)]);
    }
}
