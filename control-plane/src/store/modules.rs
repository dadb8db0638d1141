//! Modules of plugins, on disk, each under the SHA-256 of its bytes.

use super::{Store, StoreError, failed, now_ms, unsigned};
use leeward_module::{Kind, Module};
use rusqlite::{Connection, OptionalExtension, Row, params};

/// What modules may take together where nobody says otherwise, in bytes: 2 GiB.
pub(super) const DEFAULT_LIMIT: u64 = 2 << 30;
/// Modules that are kept, however small.
const MAX_MODULES: u64 = 10_000;
/// Signatures of one module.
const MAX_SIGNATURES: u64 = 16;
/// A module is stored, and sent, in pieces of so many bytes: a piece is found without reading those before it.
pub const CHUNK: usize = 64 << 10;

pub(super) const TABLES: &str = "
    CREATE TABLE modules (
        sha256 BLOB PRIMARY KEY, kind TEXT NOT NULL, version TEXT NOT NULL, imports TEXT NOT NULL,
        exports TEXT NOT NULL, size INTEGER NOT NULL, created_ms INTEGER NOT NULL, who TEXT NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE module_chunks (
        sha256 BLOB NOT NULL, place INTEGER NOT NULL, data BLOB NOT NULL, PRIMARY KEY (sha256, place)
    );
    CREATE TABLE module_signatures (
        sha256 BLOB NOT NULL, signature TEXT NOT NULL, PRIMARY KEY (sha256, signature)
    ) WITHOUT ROWID;";

/// What is known of a module that is kept.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct StoredModule {
    /// What it says of itself.
    pub module: Module,
    /// Texts of `.minisig` files.
    pub signatures: Vec<String>,
    /// When it came, in milliseconds since 1970.
    pub created_ms: i64,
    /// Who pushed it, or the image that it is of.
    pub by: String,
}

impl Store {
    /// Keeps a module; one that is there already stays as it is, and gets the signature.
    ///
    /// # Errors
    ///
    /// [`StoreError::Full`] if there is no room, [`StoreError::Signatures`] if it has too many.
    pub fn put_module(
        &self,
        module: &Module,
        bytes: &[u8],
        signature: Option<&str>,
        by: &str,
    ) -> Result<(), StoreError> {
        let mut writer = self.writer();
        let tx = writer.transaction().map_err(failed("begin"))?;
        let is_there = tx
            .query_row("SELECT 1 FROM modules WHERE sha256=?1", [module.sha256], |_| {
                Ok(())
            })
            .optional()
            .map_err(failed("read modules"))?
            .is_some();
        if !is_there {
            let (used, count) = totals(&tx).map_err(failed("read modules"))?;
            let size = u64::try_from(module.size).unwrap_or(u64::MAX);
            let limit = self.modules_limit;
            if used.saturating_add(size) > limit || count >= MAX_MODULES {
                return Err(StoreError::Full {
                    size,
                    used,
                    limit,
                    count,
                });
            }
            insert(&tx, module, bytes, by).map_err(failed("write a module"))?;
        }
        if let Some(signature) = signature {
            let have: i64 = tx
                .query_row(
                    "SELECT count(*) FROM module_signatures WHERE sha256=?1 AND signature<>?2",
                    params![module.sha256, signature],
                    |row| row.get(0),
                )
                .map_err(failed("read signatures"))?;
            if unsigned(have) >= MAX_SIGNATURES {
                return Err(StoreError::Signatures(unsigned(have)));
            }
            tx.execute(
                "INSERT OR IGNORE INTO module_signatures VALUES (?1, ?2)",
                params![module.sha256, signature],
            )
            .map_err(failed("write a signature"))?;
        }
        tx.commit().map_err(failed("commit"))
    }

    /// What is known of a module.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub fn module(&self, sha256: &[u8; 32]) -> Result<Option<StoredModule>, StoreError> {
        self.read("read a module", |db| {
            let tx = db.transaction()?;
            let found = tx
                .query_row(
                    "SELECT sha256, kind, version, imports, exports, size, created_ms, who FROM modules WHERE sha256=?1",
                    [sha256],
                    stored,
                )
                .optional()?;
            let Some(mut found) = found else {
                return Ok(None);
            };
            let mut query = tx.prepare("SELECT signature FROM module_signatures WHERE sha256=?1")?;
            let signatures = query.query_map([sha256], |row| row.get(0))?;
            found.signatures = signatures.collect::<Result<_, _>>()?;
            Ok(Some(found))
        })
    }

    /// Every module, newest first, each with the number of its signatures; without imports, exports and signatures.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub fn modules(&self) -> Result<Vec<(StoredModule, u64)>, StoreError> {
        self.read("list modules", |db| {
            let mut query = db.prepare(
                "SELECT sha256, kind, version, '', '', size, created_ms, who,
                     (SELECT count(*) FROM module_signatures s WHERE s.sha256=m.sha256)
                 FROM modules m ORDER BY created_ms DESC, sha256",
            )?;
            let rows = query.query_map([], |row| Ok((stored(row)?, unsigned(row.get(8)?))))?;
            rows.collect()
        })
    }

    /// What the modules take together, and what they may, in bytes.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub fn modules_size(&self) -> Result<(u64, u64), StoreError> {
        let (used, _) = self.read("read modules", |db| totals(db))?;
        Ok((used, self.modules_limit))
    }

    /// So many pieces of a module from a place on; fewer, or none, where it ends.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub fn module_chunks(
        &self,
        sha256: &[u8; 32],
        from: u32,
        count: u32,
    ) -> Result<Vec<Vec<u8>>, StoreError> {
        self.read("read a module", |db| {
            let mut query = db.prepare(
                "SELECT data FROM module_chunks WHERE sha256=?1 AND place>=?2 ORDER BY place LIMIT ?3",
            )?;
            let rows = query.query_map(params![sha256, from, count], |row| row.get(0))?;
            rows.collect()
        })
    }

    /// Drops a module; whether there was one.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub fn delete_module(&self, sha256: &[u8; 32]) -> Result<bool, StoreError> {
        let mut writer = self.writer();
        let tx = writer.transaction().map_err(failed("begin"))?;
        let delete = |table: &str| tx.execute(&format!("DELETE FROM {table} WHERE sha256=?1"), [sha256]);
        let deleted = delete("modules").map_err(failed("delete a module"))?;
        delete("module_chunks").map_err(failed("delete a module"))?;
        delete("module_signatures").map_err(failed("delete a module"))?;
        tx.commit().map_err(failed("commit"))?;
        Ok(deleted > 0)
    }
}

fn insert(db: &Connection, module: &Module, bytes: &[u8], by: &str) -> rusqlite::Result<()> {
    db.execute(
        "INSERT INTO modules VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
        params![
            module.sha256,
            module.kind.as_str(),
            module.version,
            // A name has no line break; see leeward_module::inspect.
            module.imports.join("\n"),
            module.exports.join("\n"),
            i64::try_from(module.size).unwrap_or(i64::MAX),
            now_ms(),
            by
        ],
    )?;
    let mut insert = db.prepare("INSERT INTO module_chunks VALUES (?1, ?2, ?3)")?;
    for (place, data) in (0u32..).zip(bytes.chunks(CHUNK)) {
        insert.execute(params![module.sha256, place, data])?;
    }
    Ok(())
}

fn totals(db: &Connection) -> rusqlite::Result<(u64, u64)> {
    db.query_row(
        "SELECT coalesce(sum(size), 0), count(*) FROM modules",
        [],
        |row| Ok((unsigned(row.get(0)?), unsigned(row.get(1)?))),
    )
}

fn stored(row: &Row<'_>) -> rusqlite::Result<StoredModule> {
    let kind: String = row.get(1)?;
    let kind = Kind::ALL.into_iter().find(|known| known.as_str() == kind);
    let lines = |text: String| text.lines().map(Box::from).collect();
    Ok(StoredModule {
        module: Module {
            kind: kind.ok_or(rusqlite::Error::InvalidQuery)?,
            version: row.get::<_, String>(2)?.into(),
            imports: lines(row.get(3)?),
            exports: lines(row.get(4)?),
            size: usize::try_from(row.get::<_, i64>(5)?).unwrap_or(0),
            sha256: row.get(0)?,
        },
        signatures: Vec::new(),
        created_ms: row.get(6)?,
        by: row.get(7)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::Scratch;

    fn module(text: &str) -> (Module, Vec<u8>) {
        let module = format!("(module (func (export \"proxy_abi_version_0_2_1\")) {text})");
        let bytes = wat::parse_str(module).unwrap();
        (leeward_module::inspect(&bytes).unwrap(), bytes)
    }

    fn bytes_of(store: &Store, module: &Module) -> Vec<u8> {
        store.module_chunks(&module.sha256, 0, u32::MAX).unwrap().concat()
    }

    #[test]
    fn a_module_is_kept_over_a_restart_in_pieces() {
        let dir = Scratch::new();
        let (module, bytes) = module(&format!("(memory 1) (data \"{}\")", "x".repeat(3 * CHUNK)));
        {
            let store = Store::open(&dir.0).unwrap();
            store.put_module(&module, &bytes, Some("s1"), "ada").unwrap();
        }
        let store = Store::open(&dir.0).unwrap();
        let found = store.module(&module.sha256).unwrap().unwrap();
        assert_eq!((&found.module, &*found.by), (&module, "ada"));
        assert_eq!(found.signatures, ["s1"]);
        assert_eq!(bytes_of(&store, &module), bytes);
        let second = store.module_chunks(&module.sha256, 1, 1).unwrap();
        assert_eq!(second, [bytes[CHUNK..2 * CHUNK].to_vec()]);
        assert!(store.module_chunks(&module.sha256, 9, 1).unwrap().is_empty());
        assert!(store.module(&[0; 32]).unwrap().is_none());
    }

    #[test]
    fn one_that_is_there_gets_another_signature_and_nothing_else() {
        let dir = Scratch::new();
        let store = Store::open(&dir.0).unwrap();
        let (module, bytes) = module("");
        store.put_module(&module, &bytes, None, "ada").unwrap();
        for n in 0..MAX_SIGNATURES {
            let signature = format!("s{n:02}");
            store
                .put_module(&module, &bytes, Some(&signature), "bob")
                .unwrap();
        }
        // What is there counts for nothing.
        store.put_module(&module, &bytes, Some("s00"), "bob").unwrap();
        let error = store
            .put_module(&module, &bytes, Some("more"), "bob")
            .unwrap_err();
        assert!(matches!(error, StoreError::Signatures(16)), "{error}");
        let found = store.module(&module.sha256).unwrap().unwrap();
        assert_eq!((&*found.by, found.signatures.len()), ("ada", 16));
        assert_eq!(store.modules().unwrap()[0].1, 16);
        assert_eq!(bytes_of(&store, &module), bytes);
    }

    #[test]
    fn what_all_take_is_bounded_and_given_back() {
        let dir = Scratch::new();
        let (first, first_bytes) = module("(memory 1)");
        let (second, second_bytes) = module("(memory 2)");
        let room = (first_bytes.len() + second_bytes.len() - 1) as u64;
        let store = Store::open(&dir.0).unwrap().with_modules_limit(room);
        store.put_module(&first, &first_bytes, None, "ada").unwrap();
        let error = store.put_module(&second, &second_bytes, None, "ada").unwrap_err();
        assert!(matches!(error, StoreError::Full { count: 1, .. }), "{error}");
        assert!(store.delete_module(&first.sha256).unwrap());
        assert!(!store.delete_module(&first.sha256).unwrap());
        assert!(bytes_of(&store, &first).is_empty());
        store.put_module(&second, &second_bytes, None, "ada").unwrap();
        assert_eq!(store.modules_size().unwrap(), (second_bytes.len() as u64, room));
    }
}
