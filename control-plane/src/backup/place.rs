//! Where backups are: a directory, or a bucket of S3 or what speaks like it.

use bytes::Bytes;
use leeward_identity::tls;
use object_store::aws::{AmazonS3Builder, S3ConditionalPut};
use object_store::local::LocalFileSystem;
use object_store::path::Path as Name;
use object_store::{
    ClientOptions, Error, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload, RetryConfig,
};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio_stream::StreamExt;

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// How long requests that failed are tried again.
const RETRY_FOR: Duration = Duration::from_secs(90);
/// Largest file of credentials, in bytes.
const MAX_CREDENTIALS: u64 = 64 << 10;
/// Objects of one listing at most.
const MAX_LISTED: usize = 2_000_000;

/// What can't be done with a place, or an object there.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlaceError {
    /// It is not a place.
    #[error(
        "{url:?} is no place for backups: {why}; want a directory, file:///DIR, or s3://BUCKET/PREFIX?region=...&endpoint=...&credentials=FILE"
    )]
    Url { url: String, why: String },
    /// The directory can't be used.
    #[error("can't use {path}")]
    Directory { path: PathBuf, source: io::Error },
    /// The file of credentials can't be used.
    #[error("can't read credentials from {path}: {why}")]
    Credentials { path: PathBuf, why: String },
    /// It isn't there.
    #[error("{name} is not there")]
    Missing { name: String },
    /// It is larger than anything that was stored.
    #[error("{name} has {size} bytes; want at most {most}")]
    Large { name: String, size: u64, most: u64 },
    /// There are more than can be looked at.
    #[error("there are more than {MAX_LISTED} objects under {prefix}")]
    Many { prefix: String },
    /// The place said no.
    #[error("can't {act} {name}")]
    Failed {
        act: &'static str,
        name: String,
        source: Error,
    },
}

/// An object as a listing shows it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Found {
    pub(crate) name: String,
    pub(crate) size: u64,
    /// When it was written, by the place's clock, in milliseconds since 1970.
    pub(crate) modified_ms: i64,
}

/// A place for backups.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    url: Arc<str>,
    store: Arc<dyn ObjectStore>,
    /// A directory's: listings of a prefix that has no directory are empty.
    dir: Option<PathBuf>,
}

impl Place {
    /// The place at a URL, or in a directory, which is made if it isn't there.
    pub(crate) fn open(url: &str) -> Result<Self, PlaceError> {
        let bad = |why: String| PlaceError::Url {
            url: url.to_owned(),
            why,
        };
        if let Some(rest) = url.strip_prefix("s3://") {
            return s3(rest, &bad).map(|store| Self {
                // What stands in messages has no path of a secret, and no secret.
                url: url.split('?').next().unwrap_or(url).into(),
                store: Arc::new(store),
                dir: None,
            });
        }
        let path = match url.strip_prefix("file://") {
            Some(path) => path,
            None if url.contains("://") => return Err(bad("its scheme is not known".to_owned())),
            None => url,
        };
        if path.is_empty() {
            return Err(bad("it is empty".to_owned()));
        }
        let failed = |source| PlaceError::Directory {
            path: path.into(),
            source,
        };
        std::fs::create_dir_all(path).map_err(failed)?;
        let dir = std::fs::canonicalize(path).map_err(failed)?;
        let store = LocalFileSystem::new_with_prefix(&dir)
            .map_err(|error| bad(error.to_string()))?
            .with_fsync(true);
        Ok(Self {
            url: url.into(),
            store: Arc::new(store),
            dir: Some(dir),
        })
    }

    /// As people gave it, without what follows a question mark.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Writes an object, over what may be there.
    pub(crate) async fn put(&self, name: &str, bytes: Vec<u8>) -> Result<(), PlaceError> {
        let put = self.store.put(&Name::from(name), PutPayload::from(bytes)).await;
        put.map(drop).map_err(failed("write", name))
    }

    /// Writes an object if there is none of that name. Says whether it did.
    pub(crate) async fn create(&self, name: &str, bytes: Vec<u8>) -> Result<bool, PlaceError> {
        let options = PutOptions::from(PutMode::Create);
        let put = self
            .store
            .put_opts(&Name::from(name), PutPayload::from(bytes), options)
            .await;
        match put {
            Ok(_) => Ok(true),
            Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => Ok(false),
            Err(error) => Err(failed("write", name)(error)),
        }
    }

    /// An object of at most so many bytes.
    pub(crate) async fn get(&self, name: &str, most: u64) -> Result<Bytes, PlaceError> {
        let got = self.store.get(&Name::from(name)).await;
        let got = got.map_err(failed("read", name))?;
        let size = got.meta.size;
        if size > most {
            let name = name.to_owned();
            return Err(PlaceError::Large { name, size, most });
        }
        got.bytes().await.map_err(failed("read", name))
    }

    /// What is under a prefix, by name; from after a name, if one is given.
    pub(crate) async fn list(&self, prefix: &str, after: Option<&str>) -> Result<Vec<Found>, PlaceError> {
        if self.dir.as_ref().is_some_and(|dir| !dir.join(prefix).exists()) {
            return Ok(Vec::new());
        }
        let name = Name::from(prefix);
        let mut listing = match after {
            None => self.store.list(Some(&name)),
            Some(after) => self.store.list_with_offset(Some(&name), &Name::from(after)),
        };
        let mut found = Vec::new();
        while let Some(next) = listing.next().await {
            let meta = match next {
                Ok(meta) => meta,
                // It went while the directory was read.
                Err(Error::NotFound { .. }) => continue,
                Err(error) => return Err(failed("list", prefix)(error)),
            };
            if found.len() >= MAX_LISTED {
                let prefix = prefix.to_owned();
                return Err(PlaceError::Many { prefix });
            }
            found.push(Found {
                name: meta.location.to_string(),
                size: meta.size,
                modified_ms: meta.last_modified.timestamp_millis(),
            });
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// Deletes an object; one that isn't there is no failure.
    pub(crate) async fn delete(&self, name: &str) -> Result<(), PlaceError> {
        match self.store.delete(&Name::from(name)).await {
            Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(failed("delete", name)(error)),
        }
    }
}

fn failed(act: &'static str, name: &str) -> impl FnOnce(Error) -> PlaceError {
    let name = name.to_owned();
    move |source| {
        if matches!(source, Error::NotFound { .. }) {
            PlaceError::Missing { name }
        } else {
            PlaceError::Failed { act, name, source }
        }
    }
}

/// A client for `BUCKET/PREFIX?region=...&endpoint=...&credentials=FILE`.
fn s3(rest: &str, bad: &dyn Fn(String) -> PlaceError) -> Result<impl ObjectStore + use<>, PlaceError> {
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (bucket, prefix) = path.split_once('/').unwrap_or((path, ""));
    if bucket.is_empty() {
        return Err(bad("it names no bucket".to_owned()));
    }
    // The client's TLS takes the process' provider.
    tls::install_provider();
    let retry = RetryConfig {
        retry_timeout: RETRY_FOR,
        ..RetryConfig::default()
    };
    let options = ClientOptions::new()
        .with_connect_timeout(CONNECT_TIMEOUT)
        .with_timeout(REQUEST_TIMEOUT);
    // AWS_ACCESS_KEY_ID and the like, a web identity, or the machine's role, as every tool of AWS takes them.
    let mut builder = AmazonS3Builder::from_env()
        .with_bucket_name(bucket)
        .with_retry(retry)
        .with_client_options(options)
        .with_conditional_put(S3ConditionalPut::ETagMatch);
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        builder = match pair.split_once('=') {
            Some(("region", region)) => builder.with_region(region),
            Some(("endpoint", endpoint)) => {
                let plain = endpoint.starts_with("http://");
                builder.with_endpoint(endpoint).with_allow_http(plain)
            }
            Some(("credentials", file)) => credentials(builder, Path::new(file))?,
            Some(_) | None => return Err(bad(format!("{pair:?} is not known"))),
        };
    }
    let store = builder.build().map_err(|error| bad(error.to_string()))?;
    Ok(object_store::prefix::PrefixStore::new(store, prefix))
}

/// Takes the first profile of a file as ~/.aws/credentials.
fn credentials(builder: AmazonS3Builder, path: &Path) -> Result<AmazonS3Builder, PlaceError> {
    use io::Read as _;
    let bad = |why: String| PlaceError::Credentials {
        path: path.to_owned(),
        why,
    };
    let mut text = String::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_CREDENTIALS).read_to_string(&mut text))
        .map_err(|error| bad(error.to_string()))?;
    let value = |name: &str| {
        text.lines().find_map(|line| {
            let (key, value) = line.split_once('=')?;
            (key.trim() == name).then(|| value.trim().to_owned())
        })
    };
    let want = |name: &str| value(name).ok_or_else(|| bad(format!("it has no {name}")));
    let builder = builder
        .with_access_key_id(want("aws_access_key_id")?)
        .with_secret_access_key(want("aws_secret_access_key")?);
    Ok(match value("aws_session_token") {
        Some(token) => builder.with_token(token),
        None => builder,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::Scratch;

    fn refused(url: &str) -> String {
        Place::open(url).unwrap_err().to_string()
    }

    #[test]
    fn what_is_no_place_is_refused_with_what_would_be_one() {
        let said = refused("ftp://x");
        assert!(
            said.starts_with(
                "\"ftp://x\" is no place for backups: its scheme is not known; want a directory"
            ),
            "{said}"
        );
        assert!(refused("s3://").contains("it names no bucket"));
        assert!(refused("s3://b/p?zone=1").contains("\"zone=1\" is not known"));
        assert!(refused("s3://b/p?credentials=/nowhere").contains("can't read credentials from /nowhere"));
    }

    #[tokio::test]
    async fn a_directory_keeps_objects_and_a_name_is_taken_once() {
        let dir = Scratch::new();
        let place = Place::open(&format!("file://{}", dir.0.display())).unwrap();
        assert_eq!(place.list("chunks", None).await.unwrap(), []);
        place.put("chunks/b", b"two".to_vec()).await.unwrap();
        place.put("chunks/a", b"one".to_vec()).await.unwrap();
        let names = |found: Vec<Found>| found.into_iter().map(|f| f.name).collect::<Vec<_>>();
        assert_eq!(
            names(place.list("chunks", None).await.unwrap()),
            ["chunks/a", "chunks/b"]
        );
        assert_eq!(
            names(place.list("chunks", Some("chunks/a")).await.unwrap()),
            ["chunks/b"]
        );
        assert!(place.create("log/1", b"x".to_vec()).await.unwrap());
        assert!(!place.create("log/1", b"y".to_vec()).await.unwrap());
        assert_eq!(&place.get("log/1", 10).await.unwrap()[..], b"x");
        assert!(matches!(
            place.get("chunks/a", 2).await,
            Err(PlaceError::Large { .. })
        ));
        place.delete("chunks/a").await.unwrap();
        place.delete("chunks/a").await.unwrap();
        assert!(matches!(
            place.get("chunks/a", 9).await,
            Err(PlaceError::Missing { .. })
        ));
    }

    #[tokio::test]
    async fn of_many_that_create_one_name_at_once_one_does() {
        let dir = Scratch::new();
        let place = Place::open(&dir.0.display().to_string()).unwrap();
        let tries = (0..16).map(|n| {
            let place = place.clone();
            tokio::spawn(async move { place.create("epochs/1", vec![n]).await.unwrap() })
        });
        let mut made = 0;
        for each in tries.collect::<Vec<_>>() {
            made += u32::from(each.await.unwrap());
        }
        assert_eq!(made, 1);
    }
}
