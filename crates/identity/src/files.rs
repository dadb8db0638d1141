//! Reading and writing the files that an identity is kept in.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// A file that is to be written: its name, what it holds, its mode.
pub(crate) type NewFile<'a> = (&'static str, &'a [u8], u32);

/// Where new files wait, whole, until they are moved into place.
const WAITING: &str = ".next";
/// The key with which a certificate was asked for by a token, until there is one.
pub(crate) const JOINING_KEY: &str = "joining-key.pem";
/// Every file that may wait there, in the order in which they are moved.
const NAMES: [&str; 7] = [
    JOINING_KEY,
    "roots.pem",
    "bundle.pem",
    "ca-key.pem",
    "ca.pem",
    "key.pem",
    "cert.pem",
];

/// Replaces files of a directory, which is made if need be: all of them or none, whenever the process or the
/// machine ends. They are written beside the old ones and synced; renaming their directory is the point from which
/// [`recover`] goes on.
pub(crate) fn install(dir: &Path, files: &[NewFile<'_>]) -> io::Result<()> {
    std::fs::create_dir_all(dir)?;
    recover(dir)?;
    let beside = dir.join(format!("{WAITING}-{}.tmp", std::process::id()));
    remove(&beside)?;
    // Keys are among them.
    std::fs::DirBuilder::new().mode(0o700).create(&beside)?;
    for (name, bytes, mode) in files {
        create(&beside.join(name), bytes, *mode)?;
    }
    File::open(&beside)?.sync_all()?;
    commit(dir, &beside)
}

/// Moves the files of a directory that is whole into place in another, all or none.
pub(crate) fn commit(dir: &Path, whole: &Path) -> io::Result<()> {
    let waiting = dir.join(WAITING);
    if std::fs::rename(whole, &waiting).is_err() {
        // Another process has come in between.
        recover(dir)?;
        std::fs::rename(whole, &waiting)?;
    }
    File::open(dir)?.sync_all()?;
    recover(dir)
}

/// Ends what [`install`] had begun when its process ended. Several processes may do it at once.
pub(crate) fn recover(dir: &Path) -> io::Result<()> {
    let waiting = dir.join(WAITING);
    if !waiting.is_dir() {
        return Ok(());
    }
    for name in NAMES {
        absent_is_fine(std::fs::rename(waiting.join(name), dir.join(name)))?;
    }
    match std::fs::remove_dir(&waiting) {
        // Another process's files have come in between; it moves them itself.
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
        removed => absent_is_fine(removed)?,
    }
    File::open(dir)?.sync_all()
}

fn remove(dir: &Path) -> io::Result<()> {
    absent_is_fine(std::fs::remove_dir_all(dir))
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn create(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Removes a file that may be gone already.
pub(crate) fn forget(path: &Path) -> io::Result<()> {
    absent_is_fine(std::fs::remove_file(path))
}

/// The mode bits that let others than the owner at a file.
pub(crate) fn open_to_others(path: &Path) -> io::Result<Option<u32>> {
    let mode = std::fs::metadata(path)?.permissions().mode() & 0o777;
    Ok((mode & 0o077 != 0).then_some(mode))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::Scratch;

    fn read(dir: &Path, name: &str) -> String {
        std::fs::read_to_string(dir.join(name)).unwrap()
    }

    #[test]
    fn files_are_replaced_together_and_what_was_begun_is_ended() {
        let scratch = Scratch::new();
        let dir = scratch.dir("id");
        let files = |text: &'static str| {
            [
                ("key.pem", text.as_bytes(), 0o600),
                ("cert.pem", text.as_bytes(), 0o644),
            ]
        };
        install(&dir, &files("one")).unwrap();
        assert_eq!(open_to_others(&dir.join("key.pem")).unwrap(), None);
        assert_eq!(open_to_others(&dir.join("cert.pem")).unwrap(), Some(0o644));
        // Ended between the two renames: the key is new already.
        let waiting = dir.join(WAITING);
        std::fs::create_dir(&waiting).unwrap();
        std::fs::write(waiting.join("cert.pem"), "two").unwrap();
        std::fs::write(dir.join("key.pem"), "two").unwrap();
        recover(&dir).unwrap();
        assert_eq!(
            (read(&dir, "key.pem"), read(&dir, "cert.pem")),
            ("two".into(), "two".into())
        );
        assert!(!waiting.exists());
        // Ended before the point of no return: nothing has happened.
        let beside = dir.join(format!("{WAITING}-{}.tmp", std::process::id()));
        std::fs::create_dir(&beside).unwrap();
        std::fs::write(beside.join("key.pem"), "three").unwrap();
        recover(&dir).unwrap();
        assert_eq!(read(&dir, "key.pem"), "two");
        install(&dir, &files("four")).unwrap();
        assert_eq!(
            (read(&dir, "key.pem"), read(&dir, "cert.pem")),
            ("four".into(), "four".into())
        );
        assert_eq!(
            std::fs::read_dir(&dir).unwrap().count(),
            2,
            "nothing is left behind"
        );
    }
}
