//! Compiled code on disk: what took seconds to compile is there in a fraction of a millisecond when the proxy starts again.
//!
//! A file is named for what it was made from: the module's digest, and everything of the engine that tells in the code. It
//! begins with a checksum over that name and the code; a file that is broken, or another's, is made anew.

use sha2::{Digest, Sha256};
use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::hash::{Hash, Hasher};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;
use wasmtime::component::Component;
use wasmtime::{Engine, Module};

/// Files of modules that are no longer used go beyond so many in all...
const MAX_FILES: usize = 64;
/// ...or so many bytes.
const MAX_BYTES: u64 = 1 << 30;
/// Code of a module of the largest size, and room to spare.
const MAX_IMAGE: u64 = 1 << 30;
/// What a file begins with.
const MAGIC: &[u8; 16] = b"leeward code v1\n";
const SUM: usize = 32;
const EXTENSION: &str = "cwasm";

/// A module in one of the two forms that there are.
#[derive(Clone)]
pub(crate) enum Artifact {
    Component(Component),
    Module(Module),
}

/// Which form a module has.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(crate) enum Form {
    Component,
    Module,
}

/// The directory.
#[derive(Debug)]
pub(crate) struct Precompiled {
    dir: PathBuf,
    /// Digest of what [`Engine::precompile_compatibility_hash`] says.
    engine: [u8; 32],
    serial: AtomicU64,
}

impl Artifact {
    pub(crate) fn compile(engine: &Engine, form: Form, bytes: &[u8]) -> wasmtime::Result<Self> {
        Ok(match form {
            Form::Component => Self::Component(Component::from_binary(engine, bytes)?),
            Form::Module => Self::Module(Module::from_binary(engine, bytes)?),
        })
    }

    fn serialize(&self) -> wasmtime::Result<Vec<u8>> {
        match self {
            Self::Component(component) => component.serialize(),
            Self::Module(module) => module.serialize(),
        }
    }
}

impl Precompiled {
    /// Opens the directory, and makes it if it isn't there.
    ///
    /// # Errors
    ///
    /// If it can't be had, or isn't this user's alone.
    pub(crate) fn open(dir: PathBuf, engine: &Engine) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        let metadata = fs::symlink_metadata(&dir)?;
        if !metadata.is_dir() || !is_private(&metadata)? || metadata.mode() & 0o077 != 0 {
            return Err(io::Error::other(
                "want a directory that belongs to the proxy's user, with mode 0700",
            ));
        }
        let mut of_engine = Digester(Sha256::new());
        engine.precompile_compatibility_hash().hash(&mut of_engine);
        let opened = Self {
            dir,
            engine: of_engine.0.finalize().into(),
            serial: AtomicU64::new(0),
        };
        opened.sweep()?;
        Ok(opened)
    }

    /// What was kept of a module, if it is there and whole.
    pub(crate) fn get(&self, engine: &Engine, form: Form, digest: &[u8; 32]) -> Option<Artifact> {
        let key = self.key(form, digest);
        let path = self.path(&key);
        let image = match read(&path, &key) {
            Ok(image) => image,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::warn!(file = %path.display(), %error, "compiled code on disk can't be used; it is made anew");
                return None;
            }
        };
        match deserialize::deserialize(engine, form, image.get(MAGIC.len() + SUM..).unwrap_or_default()) {
            Ok(artifact) => Some(artifact),
            Err(error) => {
                let error = format!("{error:#}");
                tracing::warn!(file = %path.display(), error, "compiled code on disk is not this build's; it is made anew");
                None
            }
        }
    }

    /// Keeps what a module was compiled to. That it can't be is logged; the next start is then a slow one.
    pub(crate) fn put(&self, form: Form, digest: &[u8; 32], artifact: &Artifact) {
        let key = self.key(form, digest);
        let written = artifact
            .serialize()
            .map_err(io::Error::other)
            .and_then(|image| self.write(&key, &image));
        if let Err(error) = written {
            tracing::warn!(dir = %self.dir.display(), %error, "compiled code can't be kept on disk");
        }
    }

    /// Written beside its place and moved there: a reader sees all of it, or none.
    fn write(&self, key: &[u8; 32], image: &[u8]) -> io::Result<()> {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}.{}-{serial}.tmp", hex(key), std::process::id());
        let beside = self.dir.join(name);
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&beside)?;
        let moved = file
            .write_all(MAGIC)
            .and_then(|()| file.write_all(&sum(key, image)))
            .and_then(|()| file.write_all(image))
            .and_then(|()| fs::rename(&beside, self.path(key)));
        if moved.is_err() {
            // What is left of it would only take room; what went wrong is said already.
            let _ = fs::remove_file(&beside);
        }
        moved
    }

    /// Deletes the files that were not used for the longest time, until there are few enough, but none of those that are in
    /// use.
    pub(crate) fn prune(&self, in_use: &[(Form, [u8; 32])]) -> io::Result<()> {
        let in_use: HashSet<PathBuf> = in_use
            .iter()
            .map(|(form, digest)| self.path(&self.key(*form, digest)))
            .collect();
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            // Another process may prune at the same time.
            if let Ok(metadata) = fs::symlink_metadata(&path)
                && path.extension().is_some_and(|e| e == EXTENSION)
            {
                files.push((metadata.modified()?, metadata.len(), path));
            }
        }
        files.sort();
        let (mut count, mut bytes) = (files.len(), files.iter().map(|(_, len, _)| len).sum::<u64>());
        for (_, len, path) in files {
            if count <= MAX_FILES && bytes <= MAX_BYTES {
                break;
            }
            if !in_use.contains(&path) && fs::remove_file(&path).is_ok() {
                (count, bytes) = (count - 1, bytes - len);
            }
        }
        Ok(())
    }

    /// Deletes what writers left that were ended. Another process may be writing; it then logs that it couldn't.
    fn sweep(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "tmp") {
                match fs::remove_file(&path) {
                    // Another process that starts at the same time was here first.
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    Ok(()) | Err(_) => {}
                }
            }
        }
        Ok(())
    }

    fn key(&self, form: Form, digest: &[u8; 32]) -> [u8; 32] {
        let form = match form {
            Form::Component => b"component",
            Form::Module => b"module---",
        };
        let key = Sha256::new().chain_update(self.engine).chain_update(form);
        key.chain_update(digest).finalize().into()
    }

    fn path(&self, key: &[u8; 32]) -> PathBuf {
        self.dir.join(hex(key)).with_extension(EXTENSION)
    }
}

/// The only code of Leeward that the compiler doesn't check.
#[allow(
    unsafe_code,
    reason = "compiled code can't be had from disk in another way, and compiling takes seconds"
)]
mod deserialize {
    use super::{Artifact, Form};
    use wasmtime::component::Component;
    use wasmtime::{Engine, Module};

    /// Makes a module from what was kept of it. Its checksum has been checked.
    pub(super) fn deserialize(engine: &Engine, form: Form, image: &[u8]) -> wasmtime::Result<Artifact> {
        // SAFETY: the bytes must be what `serialize` gave, unchanged: they are machine code, and are run.
        //
        // - By accident: a file that was cut short, decayed, or copied over another fails its checksum, which is over its
        //   name too. What another version of wasmtime made, or one with other settings, has another name, and wasmtime
        //   itself refuses it.
        // - By design: the checksum is no signature. That the code is ours follows from who could have written it: the
        //   directory and the file belong to the proxy's user and nobody else can write there, which is checked of the
        //   directory when it is opened and of each file before it is read. Whoever acts as that user can replace the proxy's own program, so nothing is lost to them. A
        //   signature would need a key which lies beside the files, for the same user to read, and would add nothing.
        // - The bytes are in memory when they are checked, so that a change of the file after that is not seen.
        Ok(match form {
            Form::Component => Artifact::Component(unsafe { Component::deserialize(engine, image) }?),
            Form::Module => Artifact::Module(unsafe { Module::deserialize(engine, image) }?),
        })
    }
}

/// A whole file, if it is one of ours and its checksum holds.
fn read(path: &Path, key: &[u8; 32]) -> io::Result<Vec<u8>> {
    let metadata = fs::symlink_metadata(path)?;
    if !metadata.is_file() || !is_private(&metadata)? {
        return Err(io::Error::other("it is not the proxy's own file"));
    }
    if metadata.len() > MAX_IMAGE {
        return Err(io::Error::other("it is too large"));
    }
    let bytes = fs::read(path)?;
    let rest = bytes
        .strip_prefix(MAGIC)
        .and_then(|rest| rest.split_at_checked(SUM));
    match rest {
        Some((stored, image)) if *stored == sum(key, image) => {}
        Some(_) | None => return Err(io::Error::other("its checksum is wrong")),
    }
    // The last use tells which go first. That it can't be noted is no reason to compile.
    #[expect(clippy::disallowed_methods, reason = "a stamp of a file")]
    let now = SystemTime::now();
    let _ = File::options()
        .append(true)
        .open(path)
        .and_then(|file| file.set_modified(now));
    Ok(bytes)
}

/// Whether a file or directory belongs to this process's user, and nobody else can write to it.
fn is_private(metadata: &fs::Metadata) -> io::Result<bool> {
    let own = fs::metadata("/proc/self")?.uid();
    Ok(metadata.uid() == own && metadata.permissions().mode() & 0o022 == 0)
}

fn sum(key: &[u8; 32], image: &[u8]) -> [u8; SUM] {
    Sha256::new()
        .chain_update(key)
        .chain_update(image)
        .finalize()
        .into()
}

pub(crate) fn hex(digest: &[u8]) -> String {
    digest.iter().map(|b| format!("{b:02x}")).collect()
}

/// Takes what is hashed into a digest that is the same in every process and build.
struct Digester(Sha256);

impl Hasher for Digester {
    fn write(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn finish(&self) -> u64 {
        let digest: [u8; 32] = self.0.clone().finalize().into();
        digest.first_chunk().map_or(0, |first| u64::from_le_bytes(*first))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wasmtime::Config;

    const MODULE: &str = "(module (func (export \"f\") (result i32) (i32.const 7)))";

    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("leeward-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&dir);
            Self(dir)
        }

        fn files(&self) -> Vec<PathBuf> {
            let entries = fs::read_dir(&self.0).unwrap();
            entries.map(|entry| entry.unwrap().path()).collect()
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn artifact(engine: &Engine) -> Artifact {
        let bytes = wat::parse_str(MODULE).unwrap();
        Artifact::compile(engine, Form::Module, &bytes).unwrap()
    }

    #[test]
    fn what_was_kept_is_there_whole_or_not_at_all() {
        let (dir, engine) = (Dir::new("kept"), Engine::default());
        let cache = Precompiled::open(dir.0.clone(), &engine).unwrap();
        let digest = [1; 32];
        assert!(cache.get(&engine, Form::Module, &digest).is_none());
        cache.put(Form::Module, &digest, &artifact(&engine));
        assert!(cache.get(&engine, Form::Module, &digest).is_some());
        assert!(cache.get(&engine, Form::Component, &digest).is_none());
        assert!(cache.get(&engine, Form::Module, &[2; 32]).is_none());
        let [file] = &dir.files()[..] else { panic!() };
        assert_eq!(fs::metadata(file).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(&dir.0).unwrap().mode() & 0o777, 0o700);

        // Each byte counts, and so do those that are missing.
        let whole = fs::read(file).unwrap();
        for at in [
            0,
            MAGIC.len(),
            MAGIC.len() + SUM,
            whole.len() / 2,
            whole.len() - 1,
        ] {
            let mut broken = whole.clone();
            broken[at] ^= 1;
            fs::write(file, &broken).unwrap();
            assert!(cache.get(&engine, Form::Module, &digest).is_none(), "byte {at}");
            fs::write(file, &whole[..at]).unwrap();
            assert!(cache.get(&engine, Form::Module, &digest).is_none(), "cut at {at}");
        }
        // Nor does a file pass for another.
        fs::write(cache.path(&cache.key(Form::Module, &[3; 32])), &whole).unwrap();
        assert!(cache.get(&engine, Form::Module, &[3; 32]).is_none());
        cache.put(Form::Module, &digest, &artifact(&engine));
        assert!(
            cache.get(&engine, Form::Module, &digest).is_some(),
            "it was replaced"
        );
    }

    #[test]
    fn another_engine_has_other_files() {
        let (dir, engine) = (Dir::new("engines"), Engine::default());
        let other = Engine::new(Config::new().epoch_interruption(true)).unwrap();
        let cache = Precompiled::open(dir.0.clone(), &engine).unwrap();
        let foreign = Precompiled::open(dir.0.clone(), &other).unwrap();
        cache.put(Form::Module, &[1; 32], &artifact(&engine));
        assert!(foreign.get(&other, Form::Module, &[1; 32]).is_none());
        foreign.put(Form::Module, &[1; 32], &artifact(&other));
        assert_eq!(dir.files().len(), 2);
        // Were it to have the name of ours, wasmtime would refuse it.
        assert!(deserialize_of(&cache, &other, [1; 32]).is_err());
    }

    fn deserialize_of(cache: &Precompiled, engine: &Engine, digest: [u8; 32]) -> wasmtime::Result<Artifact> {
        let key = cache.key(Form::Module, &digest);
        let bytes = read(&cache.path(&key), &key).unwrap();
        deserialize::deserialize(engine, Form::Module, &bytes[MAGIC.len() + SUM..])
    }

    #[test]
    fn a_directory_that_others_can_use_is_refused() {
        let (dir, engine) = (Dir::new("open"), Engine::default());
        DirBuilder::new().mode(0o700).create(&dir.0).unwrap();
        fs::set_permissions(&dir.0, fs::Permissions::from_mode(0o755)).unwrap();
        let refused = Precompiled::open(dir.0.clone(), &engine).unwrap_err();
        assert!(refused.to_string().contains("0700"), "{refused}");
    }

    #[test]
    fn files_that_nobody_uses_go_oldest_first() {
        let (dir, engine) = (Dir::new("prune"), Engine::default());
        let cache = Precompiled::open(dir.0.clone(), &engine).unwrap();
        let digest = |n: u8| [n; 32];
        let old = SystemTime::UNIX_EPOCH;
        for n in 0..=u8::try_from(MAX_FILES + 1).unwrap() {
            let path = cache.path(&cache.key(Form::Module, &digest(n)));
            fs::write(&path, "x").unwrap();
            let at = old + std::time::Duration::from_secs(n.into());
            File::options()
                .append(true)
                .open(&path)
                .unwrap()
                .set_modified(at)
                .unwrap();
        }
        cache.prune(&[(Form::Module, digest(0))]).unwrap();
        let there = |n| cache.path(&cache.key(Form::Module, &digest(n))).exists();
        assert_eq!(dir.files().len(), MAX_FILES);
        assert!(there(0), "it is in use");
        assert!(!there(1) && !there(2) && there(3), "the oldest go");
    }
}
